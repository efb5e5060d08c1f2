"""`fake_worker` that takes a second and a half."""

from __future__ import annotations

import time

import fake_worker

if __name__ == "__main__":
    time.sleep(1.5)
    fake_worker.main()
