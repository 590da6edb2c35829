# finback for CPUs: docker build -t finback . && docker run --rm -v ./runs:/runs finback run recipes/tiny.py --runs /runs
FROM python:3.11-slim

# finback compiles its kernels on first use; without a compiler it uses slower ones
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 finback && install -d -o finback /runs

WORKDIR /opt/finback
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY finback finback
# this index has torch without CUDA, which is a tenth of the size
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt .
COPY recipes recipes

USER finback
VOLUME /runs
EXPOSE 8000
ENTRYPOINT ["finback"]
CMD ["doctor"]
