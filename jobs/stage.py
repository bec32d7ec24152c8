"""One stage alone, or any other command, for ``ray job submit``.

::

    ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/stage.py features CONFIG

The first argument is a command of ``rose-ray``: ingest, warmup, bank, features, score, select, status, explain.
"""

import sys

from rose_ray.cli import app

if __name__ == "__main__":
    app(sys.argv[1:], prog_name="jobs/stage.py")
