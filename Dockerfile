# docker build --target cpu -t retinanet .
# docker build --target gpu -t retinanet:gpu .        # needs the NVIDIA container toolkit to run
FROM python:3.13-slim AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY src src
RUN pip wheel --no-deps -w /wheels .

FROM python:3.13-slim AS base
ENV PIP_NO_CACHE_DIR=1
RUN useradd --create-home retinanet && mkdir /work && chown retinanet /work
COPY --from=wheel /wheels /wheels
ENTRYPOINT ["retinanet"]

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
# Triton compiles its launcher on first use.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install "$(echo /wheels/*.whl)[onnx,serve,video]"
USER retinanet
WORKDIR /work

FROM base AS cpu
RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu \
 && pip install "$(echo /wheels/*.whl)[onnx,serve,video]"
USER retinanet
WORKDIR /work
