# vLLM's own router, for several replicas (docs/deploy.md), from the lock file. Build it from the repository's root:
#   docker build -f docker/router.Dockerfile -t hiprune-router:0.1.0 .
ARG BASE_IMAGE=docker.io/library/python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY requirements/build.lock requirements/router.lock requirements/
RUN python3 -m venv /opt/build \
    && /opt/build/bin/python -m pip install --no-cache-dir --require-hashes -r requirements/build.lock \
    && python3 -m venv --without-pip /opt/router \
    && /opt/build/bin/uv pip install --system-certs --no-cache --python /opt/router/bin/python --no-deps \
        --require-hashes --compile-bytecode -r requirements/router.lock

FROM ${BASE_IMAGE}
# The package's version belongs to the distribution that the base image is of.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --gid 0 --no-log-init --home-dir /tmp --shell /usr/sbin/nologin router
COPY --from=build /opt/router /opt/router
ENV PATH=/opt/router/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:0
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=1m --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/liveness'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "vllm-router"]
CMD ["--help"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hiprune-router" \
    org.opencontainers.image.description="vLLM's router in front of replicas of a server with a visual-token budget per request" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
