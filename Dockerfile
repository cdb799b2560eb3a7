# For a CPU:          docker build -t hpm .
# For an NVIDIA GPU:  docker build -t hpm --build-arg TORCH=cu130 .
#
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD":/work \
#       hpm pretrain photos/ --out runs/first

FROM python:3.13-slim AS wheel
WORKDIR /hpm
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
# One of the builds of PyTorch at TORCH_INDEX: cpu, cu130, ...
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/$TORCH
ARG EXTRAS=clusters,dense,heic,hf,multichannel,onnx,parquet,stream,timm,video

# On a GPU, torch.compile calls a C compiler when a training starts.
RUN case "$TORCH" in cu*) \
        apt-get update && apt-get install --yes --no-install-recommends g++ \
        && rm -rf /var/lib/apt/lists/* ;; \
    esac
# Versions that were tested together.
RUN --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    pip install --no-cache-dir --constraint /tmp/constraints.txt \
        --index-url "$TORCH_INDEX" torch torchvision
RUN --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /tmp/constraints.txt \
        "$(echo /wheels/*.whl)[$EXTRAS]"

# Caches of matplotlib, torch.compile and timm, whichever user the container runs as.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["hpm"]
CMD ["--help"]
