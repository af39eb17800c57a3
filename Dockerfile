# docker build -t captioner .
# mkdir -p runs
# docker run --rm --gpus all --shm-size=8g -u "$(id -u):$(id -g)" -v "$PWD/photos:/data" -v "$PWD/runs:/runs" captioner \
#     train.py /data/captions.csv --output_dir /runs/mine
FROM python:3.12-slim
WORKDIR /app
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY . .
# Not root. What it writes to must be this user's, or --user yours: `docker run -v` makes a missing folder root's.
# Caches go to the output folder, or to HF_HOME.
USER 1000
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
