# The load tests (docs/load-testing.md), from the lock file. Build it from the repository's root:
#   docker build -f docker/load.Dockerfile -t hiprune-load:0.1.0 .
ARG BASE_IMAGE=docker.io/library/python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY requirements/build.lock requirements/load.lock requirements/
RUN python3 -m venv /opt/build \
    && /opt/build/bin/python -m pip install --no-cache-dir --require-hashes -r requirements/build.lock \
    && python3 -m venv --without-pip /opt/load \
    && /opt/build/bin/uv pip install --system-certs --no-cache --python /opt/load/bin/python --no-deps \
        --require-hashes --compile-bytecode -r requirements/load.lock

FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --gid 0 --no-log-init --home-dir /tmp --shell /usr/sbin/nologin load
COPY --from=build /opt/load /opt/load
COPY loadtests /opt/load/src/loadtests
ENV PATH=/opt/load/bin:$PATH \
    PYTHONPATH=/opt/load/src \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:0
STOPSIGNAL SIGINT
# A job that ends by itself: what there is to check is its exit status.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "loadtests.load"]
CMD ["--help"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hiprune-load" \
    org.opencontainers.image.description="Load tests of a vLLM server with a visual-token budget per request" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
