# DeepSeek-VL2 fine-tuning on a machine with NVIDIA GPUs: Paddle's official image, and the locked packages beside its Paddle.
#
#   docker build -t deepseek-vl2-finetune .
#   docker run --rm -it --gpus all --shm-size=1g -v "$PWD:/data" deepseek-vl2-finetune doctor
#
# Drivers older than CUDA 12: --build-arg PADDLE_IMAGE=...:3.3.1-gpu-cuda11.8-cudnn8.9. README.gpu.md says more.
ARG PADDLE_IMAGE=ccr-2vdh3abv-pub.cnc.bj.baidubce.com/paddlepaddle/paddle:3.3.1-gpu-cuda12.6-cudnn9.5
FROM ${PADDLE_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# A virtual environment that sees the image's packages: what the lock names otherwise is put before them, and nothing of
# the image is removed, which pip refuses for packages of the system. Without pip of its own: the image has one.
ENV VENV=none PATH=/opt/packages/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/deepseek-vl2-finetune
COPY requirements.lock ./
RUN python3 -m venv --system-site-packages --without-pip /opt/packages \
    && grep -v '^paddlepaddle==' requirements.lock > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --no-deps -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY launch.sh pyproject.toml LICENSE ./
COPY conf conf
COPY vl2 vl2
COPY data data
COPY train train
COPY tests tests
# Compares every package with the lock, the image's Paddle too. A build sees no GPU, which a GPU build of Paddle would refuse.
RUN bash launch.sh config conf=sft_tiny device=cpu > /dev/null

# Where runs and what they fetch lie: mount it, or they go with the container.
WORKDIR /data
ENV HOME=/data
ENTRYPOINT ["bash", "/opt/deepseek-vl2-finetune/launch.sh"]
CMD ["help"]
