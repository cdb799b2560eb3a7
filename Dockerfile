# For a CPU:          docker build -t hpm .
# For an NVIDIA GPU:  docker build -t hpm --build-arg TORCH=https://download.pytorch.org/whl/cu130 .
#
#   docker run --rm --gpus all --shm-size 8g -v "$PWD":/work hpm pretrain photos/ --out runs/first
FROM python:3.13-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
ARG EXTRAS=clusters,dense,heic,hf,multichannel,onnx,parquet,stream,timm,video

RUN pip install --no-cache-dir torch torchvision --index-url "$TORCH"
WORKDIR /opt/hpm
COPY pyproject.toml README.md LICENSE ./
COPY hpm hpm
RUN pip install --no-cache-dir ".[$EXTRAS]"

# Caches of matplotlib, torch.compile and timm, whichever user the container runs as.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["hpm"]
CMD ["--help"]
