"""From a red test to the first version of a component that makes it red."""
