"""The whole job, for ``ray job submit``.

::

    ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/run.py CONFIG [--set a.b=value ...]

The same as ``rose-ray run``; the driver is light and runs on the head node.
"""

import sys

from rose_ray.cli import app

if __name__ == "__main__":
    app(["run", *sys.argv[1:]], prog_name="jobs/run.py")
