"""What the tests of the suite are made of. Only `worker`, `clock`, `environment` and `memory` import torch."""
