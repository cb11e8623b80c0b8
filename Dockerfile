# The environment and a copy of this clone; runs the test suite as a user who is not root.
#   docker build -t samlove .                          torch for the CPU
#   docker build -t samlove --build-arg TORCH=cu130 .  torch for CUDA 13
FROM python:3.11-slim-bookworm
ARG TORCH=cpu
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home samlove
USER samlove
WORKDIR /home/samlove/samlove
# torch first, and the other packages before the code, so that an edit of the code installs nothing again.
COPY --chown=samlove constraints.txt ./
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir -c constraints.txt torch torchvision \
        --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY --chown=samlove Makefile README.md pyproject.toml setup.py ./
RUN mkdir samlove stores pipelines && PIP_NO_CACHE_DIR=1 make install
COPY --chown=samlove . .
RUN touch .venv/.installed
CMD ["make", "test"]
