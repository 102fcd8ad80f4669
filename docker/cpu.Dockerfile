# The demo on the CPU engine, from the lock file. Build it from the repository's root:
#   docker build -f docker/cpu.Dockerfile -t hiprune-cpu:0.1.0 .
ARG BASE_IMAGE=docker.io/library/python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY requirements/build.lock requirements/image.lock requirements/
RUN python3 -m venv /opt/build \
    && /opt/build/bin/python -m pip install --no-cache-dir --require-hashes -r requirements/build.lock \
    && python3 -m venv --without-pip /opt/hiprune \
    && /opt/build/bin/uv pip install --system-certs --no-cache --python /opt/hiprune/bin/python --no-deps \
        --require-hashes --compile-bytecode -r requirements/image.lock
COPY LICENSE README.md pyproject.toml hatch_build.py ./
COPY vllm_plugin vllm_plugin
COPY server server
RUN /opt/build/bin/python -m hatchling build --target wheel \
    && /opt/build/bin/uv pip install --offline --python /opt/hiprune/bin/python --no-deps \
        --compile-bytecode dist/*.whl

FROM ${BASE_IMAGE}
# The engine loads libnuma. The versions belong to the distribution that the base image is of.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --gid 0 --no-log-init --home-dir /var/cache/hiprune --shell /usr/sbin/nologin hiprune \
    && install --directory --owner 10001 --group 0 --mode 0775 /var/cache/hiprune
COPY --from=build /opt/hiprune /opt/hiprune
# All that is written at run time goes to the home, a volume, or to the temporary folder. There is no
# compiler here: what the engine would compile at a request's first use runs as it is.
ENV TORCH_COMPILE_DISABLE=1 \
    PATH=/opt/hiprune/bin:$PATH \
    HOME=/var/cache/hiprune \
    USER=hiprune \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /var/cache/hiprune
USER 10001:0
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
# As process 1 an init hands signals on from the first moment and reaps what workers leave behind.
ENTRYPOINT ["tini", "--", "hiprune-serve"]
CMD ["--demo", "--host=0.0.0.0", "--port=8000"]
# Last, so that a new version or revision costs no layer.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hiprune-cpu" \
    org.opencontainers.image.description="OpenAI-compatible vLLM server with a visual-token budget per request: demo model, CPU engine" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
