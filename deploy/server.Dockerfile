# The untrusted end: the model's weights, the GPU. Build from the top of the tree:
#   docker build -f deploy/server.Dockerfile -t tsqp-server .
# Each RUN is a script of deploy/steps, which runs without Docker, too (deploy/check.sh runs them all).
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-bookworm AS build
# Both are settings of pip; unset they are its defaults.
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
COPY . /source
RUN /source/deploy/steps/build-wheel.sh /source /wheels

FROM python:${PYTHON_VERSION}-slim-bookworm
# torch as the index has it: with CUDA. The driver comes from the host (--gpus).
ARG TORCH=torch
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
ARG UID=10001
COPY --from=build /wheels /wheels
COPY deploy/steps /steps
RUN /steps/install.sh /wheels /opt/tsqp metrics \
    && /steps/directories.sh ${UID} /run/tsqp
# Without OMP_WAIT_POLICY torch's idle workers take the cores the runner needs.
# A user without an entry in passwd needs HOME and USER, which libraries ask for.
ENV PATH=/opt/tsqp/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp \
    USER=tsqp
# The same number as in the runner's image: the segment and the socket are for one user only.
USER ${UID}:${UID}
VOLUME ["/run/tsqp"]
STOPSIGNAL SIGTERM
# A real computation on the device, not just a socket that is open.
HEALTHCHECK --interval=10s --timeout=10s --start-period=300s --retries=3 \
    CMD ["tsqp", "health", "--endpoint", "ipc:///run/tsqp/server.sock", "--timeout", "8"]
ENTRYPOINT ["tsqp", "serve", "--endpoint", "ipc:///run/tsqp/server.sock"]
CMD ["--max-clients", "4"]
