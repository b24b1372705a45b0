# composer-prior in a container, for CPUs and NVIDIA GPUs:
#
#     docker build --tag composer-prior --build-arg EXTRAS=cuda,convert .
#     docker run --gpus all --volume "$PWD:/work" composer-prior train prior_vit.yaml
#
# EXTRAS are optional parts of pyproject.toml. With PIP_EXTRA_INDEX_URL, the address of PyTorch's packages for CPUs, the
# image has no CUDA libraries.
FROM debian:bookworm-slim
ARG EXTRAS=""
ARG PIP_EXTRA_INDEX_URL=""
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --create-home --uid 1000 user \
    && install --directory --owner user /work
ENV PATH="/opt/venv/bin:$PATH"
COPY . /tmp/source
RUN pip install --no-cache-dir --constraint /tmp/source/constraints.txt "/tmp/source${EXTRAS:+[$EXTRAS]}"
USER 1000
WORKDIR /work
ENTRYPOINT ["composer-prior"]
CMD ["--help"]
