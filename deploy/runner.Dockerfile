# The trusted end: tokenizer, prompt, sampling. Build from the top of the tree:
#   docker build -f deploy/runner.Dockerfile -t tsqp-runner .
# A container protects nothing from its host: this image is for a confidential guest, or for development.
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-bookworm AS build
# Both are settings of pip; unset they are its defaults.
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
COPY . /source
RUN /source/deploy/steps/build-wheel.sh /source /wheels

FROM python:${PYTHON_VERSION}-slim-bookworm
# The runner computes on the CPU: point PIP_INDEX_URL at an index with builds for the CPU only, or pin TORCH to one.
ARG TORCH=torch
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
ARG UID=10001
COPY --from=build /wheels /wheels
COPY deploy/steps /steps
RUN /steps/install.sh /wheels /opt/tsqp \
    && /steps/directories.sh ${UID} /run/tsqp
# TOKENIZERS only looks like a secret.
# hadolint ignore=DL3064
ENV PATH=/opt/tsqp/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive \
    HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false \
    HOME=/tmp \
    USER=tsqp
# The same number as in the server's image: the segment and the socket are for one user only.
USER ${UID}:${UID}
VOLUME ["/run/tsqp"]
STOPSIGNAL SIGTERM
# One command, no service: there is nothing to ask for its health.
HEALTHCHECK NONE
# The prompt comes by the standard input: the arguments of a container are its host's to read.
ENTRYPOINT ["tsqp", "run", "--endpoint", "ipc:///run/tsqp/server.sock"]
CMD ["--max-new-tokens", "64"]
