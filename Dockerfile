# Image for every node of a Ray cluster: the code and its dependencies, no data and no weights.
#
#   docker build -t rose-ray .
#
# The Ray version and the Python version must be those of constraints.txt.
FROM rayproject/ray:2.60.0-py311-cu128

# The base image's own user "ray", by number so that Kubernetes can check that it is not root.
USER 1000:100
RUN mkdir -p /home/ray/rose_ray
WORKDIR /home/ray/rose_ray

# Dependencies first: this layer stays cached until a version changes.
COPY --chown=1000:100 pyproject.toml constraints.txt README.md ./
COPY --chown=1000:100 rose_ray/__init__.py rose_ray/
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install -c constraints.txt torch setuptools wheel hatchling editables \
    && DS_BUILD_OPS=0 pip install --no-build-isolation -c constraints.txt deepspeed \
    && pip install --no-build-isolation -c constraints.txt '.[s3]'

COPY --chown=1000:100 rose_ray rose_ray
COPY --chown=1000:100 jobs jobs
RUN pip install --no-build-isolation --no-deps --force-reinstall . \
    && rose-ray --help > /dev/null
