"""What the tests of the suite are made of. Only `worker`, `clock`, `environment`, `memory` and `trace` import torch."""
