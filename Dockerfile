# An image with sam3jax and all that it takes to train.
#
#   docker build -t sam3jax .                              # CPU
#   docker build -t sam3jax --build-arg EXTRAS=cuda,video,convert .   # NVIDIA: run with --gpus all
#   docker run --rm -v "$PWD/runs:/work/runs" sam3jax demo
#
# A training is stopped as `docker stop` does it, by SIGTERM: it saves and continues with the same command.
FROM python:3.12-slim

ARG EXTRAS=video
RUN useradd --create-home user && mkdir /work && chown user /work
COPY pyproject.toml README.md LICENSE /source/
COPY sam3jax /source/sam3jax
COPY convert /source/convert
COPY configs /source/configs
RUN pip install --no-cache-dir "/source[${EXTRAS}]" && rm -rf /source

USER user
WORKDIR /work
STOPSIGNAL SIGTERM
# Time to save: docker stop --time 120
ENTRYPOINT ["sam3jax"]
CMD ["--help"]
