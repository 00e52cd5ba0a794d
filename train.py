"""Fine-tune a network with Wasserstein distributional adversarial training: the same as `wdat train`.

python train.py model=Rebuffi2021 attack=wpgd
python train.py experiment=quickstart
python train.py resume=RUN_DIR
"""

from wdat.cli.app import run

if __name__ == "__main__":
    run("train")
