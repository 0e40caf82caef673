# syntax=docker/dockerfile:1.7
# vLLM with perennial's plugin, which finds adapters by name (docs/serving.md). Build from the repository root:
#   docker build --file deploy/vllm.Dockerfile --tag perennial-vllm:0.1.0 .
# VLLM_IMAGE: another release, or the build for other hardware. The plugin is tested with vLLM 0.32.0.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# What builds; none of it is in the image that runs.
FROM ${PYTHON_IMAGE} AS tools
WORKDIR /src
COPY requirements-uv.lock ./
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements-uv.lock
COPY requirements.lock ./
RUN uv pip install --system --no-cache --only-binary :all: --constraint requirements.lock hatchling
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY perennial ./perennial
COPY storage ./storage
COPY streams ./streams
COPY learner ./learner
RUN python -m hatchling build --target wheel --directory /wheel

FROM ${VLLM_IMAGE}
# What the image has stays as it is: its packages are the constraints, and only what it lacks is added.
RUN --mount=type=bind,from=tools,source=/wheel,target=/wheel \
    python3 -m pip freeze --exclude-editable | grep '==' > /tmp/image.txt \
    && python3 -m pip install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --constraint /tmp/image.txt /wheel/*.whl \
    && rm /tmp/image.txt
# The base that learners use as long as PERENNIAL_BASE names no other.
COPY learner/model/shipped/base-v1 /opt/perennial/shipped
RUN groupadd --gid 10001 perennial \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/perennial --shell /usr/sbin/nologin perennial \
    && install --directory --owner=10001 --group=10001 /var/lib/perennial
ENV HOME=/var/lib/perennial \
    HF_HOME=/var/lib/perennial/huggingface \
    VLLM_CACHE_ROOT=/var/lib/perennial/vllm \
    XDG_CACHE_HOME=/var/lib/perennial/cache \
    PERENNIAL_RESOLVER_DIR=/var/lib/perennial/adapters \
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 \
    VLLM_PLUGINS=perennial \
    VLLM_NO_USAGE_STATS=1

# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/perennial
ENTRYPOINT ["vllm", "serve"]
CMD ["/opt/perennial/shipped", "--served-model-name", "base", "--enable-lora", "--max-lora-rank", "32"]
