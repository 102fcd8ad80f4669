# The server on vLLM's official CUDA image. Build it from the repository's root:
#   docker build -f docker/gpu.Dockerfile -t hiprune-gpu:0.1.0 .
# A mirror or another build of the same vLLM release: --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=docker.io/vllm/vllm-openai:v0.33.0
ARG BUILD_IMAGE=docker.io/library/python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY requirements/build.lock requirements/
RUN python3 -m venv /opt/build \
    && /opt/build/bin/python -m pip install --no-cache-dir --require-hashes -r requirements/build.lock
COPY LICENSE README.md pyproject.toml hatch_build.py ./
COPY vllm_plugin vllm_plugin
COPY server server
RUN /opt/build/bin/python -m hatchling build --target wheel

FROM ${BASE_IMAGE}
USER 0
# The package's version belongs to the distribution that the base image is of.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --gid 0 --no-log-init --home-dir /var/cache/hiprune --shell /usr/sbin/nologin hiprune \
    && install --directory --owner 10001 --group 0 --mode 0775 /var/cache/hiprune
# Our wheel alone, beside vLLM, without the network. The image is not made where a requirement of
# the wheel's is not met by what the base image has.
RUN --mount=type=bind,from=build,source=/src/dist,target=/mnt/dist \
    --mount=type=bind,from=build,source=/opt/build/bin,target=/mnt/bin \
    python="$(command -v python3)" \
    && /mnt/bin/uv pip install --offline --no-cache --python "$python" --break-system-packages \
        --no-deps --compile-bytecode /mnt/dist/*.whl \
    && { /mnt/bin/uv pip check --offline --no-cache --python "$python" > /tmp/check 2>&1 || true; } \
    && if grep hiprune-vllm /tmp/check; then exit 1; fi \
    && rm /tmp/check
# All that is written at run time goes to the home, a volume, or to the temporary folder.
ENV HOME=/var/cache/hiprune \
    USER=hiprune \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/hiprune/inductor \
    VLLM_NO_USAGE_STATS=1
WORKDIR /var/cache/hiprune
USER 10001:0
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start fetches the model: tens of gigabytes may take half an hour.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
# As process 1 an init hands signals on from the first moment and reaps what workers leave behind.
ENTRYPOINT ["tini", "--", "hiprune-serve"]
CMD ["llava-hf/llava-1.5-7b-hf", "--host=0.0.0.0", "--port=8000"]
# Last, so that a new version or revision costs no layer.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hiprune-gpu" \
    org.opencontainers.image.description="OpenAI-compatible vLLM server with a visual-token budget per request: CUDA" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
