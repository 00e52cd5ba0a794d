"""Measure the distributional robustness of a network: the same as `wdat evaluate`.

python evaluate.py model=Rebuffi2021 "attacks=[pgd,wpgd,knapsack]" "deltas=[2/255,8/255]" "losses=[ce,redlr]"
python evaluate.py model=resnet2b model.checkpoint=FILE data=npz data.path=FILE.npz threat=w2_l2 deltas=[0.25]
python evaluate.py resume=RUN_DIR
"""

from wdat.cli.app import run

if __name__ == "__main__":
    run("evaluate")
