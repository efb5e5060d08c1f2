"""What the tests of the suite are made of. Only `worker`, `clock` and `environment` import torch."""
