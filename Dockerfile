# chatd in a container: `docker build --tag chatd .`, then `docker run --publish 8085:8085 --volume chatd:/var/lib/chatd chatd`.
# docs/operations.md describes it in the chapter "In a container".  BASE is any image with glibc, Python 3.11 or newer and
# its module venv.
ARG BASE=python:3.13-slim-trixie

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /build
COPY requirements-build.txt requirements.txt ./
RUN /build/bin/pip install --no-cache-dir --require-hashes --only-binary=:all: --requirement requirements-build.txt
# The environment of the server has no pip.
RUN python3 -m venv --without-pip /opt/chatd \
    && /build/bin/pip --python /opt/chatd/bin/python install --no-cache-dir --require-hashes --only-binary=:all: \
        --requirement requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY seed seed
COPY schemas schemas
COPY scripts scripts
COPY twisted twisted
COPY chatd chatd
# The help writes Twisted's cache of plug-ins, which nobody can write later.  Twisted ignores a cache that is as old as a
# plug-in, and the files of an image have times in whole seconds.
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel . \
    && /build/bin/pip --python /opt/chatd/bin/python install --no-cache-dir --no-index --no-deps /wheel/*.whl \
    && /opt/chatd/bin/chatd serve --help >/dev/null \
    && touch --date='1 minute' /opt/chatd/lib/python3*/site-packages/twisted/plugins/dropin.cache

FROM ${BASE}
RUN useradd --uid 10001 --create-home --home-dir /var/lib/chatd --shell /usr/sbin/nologin chatd \
    && chmod 700 /var/lib/chatd
COPY --from=build /opt/chatd /opt/chatd
# `docker stop` kills a container after 10 s.  Where that time is longer, CHATD_DRAIN may be too.
ENV PATH=/opt/chatd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    CHATD_STORE=sqlite:/var/lib/chatd/chatd.sqlite \
    CHATD_DRAIN=5
# By its number, so that Kubernetes sees that it is not root.
USER 10001:10001
WORKDIR /var/lib/chatd
VOLUME /var/lib/chatd
EXPOSE 8085
STOPSIGNAL SIGTERM
# The loopback needs no proxy, whatever the environment names.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8085, timeout=4); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["chatd"]
CMD ["serve"]
