"""The runs of the staleness study: losses as settings over the demo's recipe, and runs by their names."""

from typing import NamedTuple

from benchmarks.tasks.long_arithmetic import POLICY

STALENESSES = (0, 1, 4, 8, 16, 32)
FIRST_STALENESSES = (0, 8, 16)
SEEDS = (0, 1, 2)
SCREENED = 8
NUM_BEST = 3
NUM_STEPS, NUM_HELD_OUT, EVALUATE_EVERY = 60, 2048, 20
BASE = [
    "actor.num_mini_batches=4",
    "actor.eps_clip=0.2",
    "actor.eps_clip_higher=0.28",
    "actor.divergence_guard=warn",
    f"learner.steps={NUM_STEPS}",
    f"evaluation.num_prompts={NUM_HELD_OUT}",
    "evaluation.completions_per_prompt=1",
]
"""Settings over the demo's recipe."""
SEQUENCE, NO_CLIP = "actor.ratio_gradient=sequence", "actor.behaviour_clip=false"
COUPLED, TOKEN = "actor.use_decoupled_loss=false", "actor.importance_sampling_level=token"
WEIGHTS, CAP = "actor.behav_imp_weight_mode", "actor.behav_imp_weight_cap"
NARROW = ["actor.eps_clip=0.067", "actor.eps_clip_higher=0.093"]
LOSSES: dict[str, list[str]] = {
    "baseline": [SEQUENCE, NO_CLIP, "actor.num_mini_batches=1"],
    "default, wide clip": [],
    "baseline, 4 mini-batches": [SEQUENCE, NO_CLIP],
    "default, wide clip, 1 mini-batch": ["actor.num_mini_batches=1"],
    "coupled": [SEQUENCE, NO_CLIP, COUPLED],
    "behaviour clip": [SEQUENCE],
    "gradient per token": [NO_CLIP],
    "OPSM": ["actor.eps_clip_higher=1000"],
    "TIS": [TOKEN, NO_CLIP, f"{WEIGHTS}=token_truncate", f"{CAP}=2"],
    "IcePop": [TOKEN, NO_CLIP, f"{WEIGHTS}=token_band"],
    "M2PO": [TOKEN, NO_CLIP, COUPLED, "actor.trust_region=second_moment"],
    "SAPO": [TOKEN, NO_CLIP, COUPLED, "actor.trust_region=soft"],
    "paper": ["actor.preset=paper", COUPLED, "actor.eps_clip=3e-4", "actor.eps_clip_higher=4e-4"],
    "sequence weights truncated": [SEQUENCE, NO_CLIP, f"{WEIGHTS}=sequence_truncate", f"{CAP}=1.5"],
    "sequence weights masked": [SEQUENCE, NO_CLIP, f"{WEIGHTS}=sequence_mask", f"{CAP}=1.5"],
    "default": NARROW,
    "preset baseline": [
        *("actor.preset=baseline", "actor.num_mini_batches=1", "actor.group_size=8"),
        *("actor.eps_clip=0.4", "actor.eps_clip_higher=null"),
    ],
    "default, wide clip, 2 mini-batches": ["actor.num_mini_batches=2"],
    "uncorrected": [SEQUENCE, NO_CLIP, f"{WEIGHTS}=disabled"],
}
"""Settings over `BASE`, with 4 mini-batches unless the name says otherwise. `baseline`: the baseline objective with the
demo's clip range and aggregation; `preset baseline`: with its own. `default`: Headrace's default, a gradient per token
and the behaviour clip with eps 0.067/0.093; `default, wide clip`: the same with eps 0.2/0.28."""
DEALT, KEPT = "actor.mini_batch_split=completions", "actor.dynamic_sampling=false"
SPLITS: dict[str, list[str]] = {
    "default": NARROW,
    "dealt": [*NARROW, DEALT],
    "kept": [*NARROW, KEPT],
    "kept and dealt": [*NARROW, KEPT, DEALT],
}
"""Mini-batches of whole groups or of distributed completions; uniform groups dropped or kept in the batch."""
SPLIT_STALENESSES = (0, 2, 16)
FAST = [*LOSSES["baseline, 4 mini-batches"], "optimizer.lr=6e-4", "learner.steps=40"]
GUARDED: dict[str, list[str]] = {
    "baseline, 4 mini-batches, lr 6e-4": FAST,
    "baseline, 4 mini-batches, lr 6e-4, guarded": [*FAST, "actor.divergence_guard=act"],
}
"""At three times the demo's lr, 40 steps, without the guard and with it."""
GUARDED_LONG: dict[str, list[str]] = {
    "baseline": LOSSES["baseline"],
    "baseline, guarded": [*LOSSES["baseline"], "actor.divergence_guard=act"],
}
"""The same at the demo's lr on the second task, where the baseline loss collapses."""
BY_NAME = LOSSES | GUARDED | GUARDED_LONG | SPLITS
LONG = [
    "task.name=benchmarks.tasks.long_arithmetic:LongArithmetic",
    f"model.path={POLICY}",
    "sampling.max_new_tokens=80",
]


class Run(NamedTuple):
    loss: str
    staleness: int
    seed: int
    is_long: bool = False

    @property
    def name(self) -> str:
        task = "long answers, " if self.is_long else ""
        return f"{task}{self.loss}, staleness {self.staleness}, seed {self.seed}"

    @property
    def settings(self) -> list[str]:
        loss = BY_NAME[self.loss]
        return [
            *BASE,
            *(LONG if self.is_long else []),
            *loss,
            f"learner.max_staleness={self.staleness}",
            f"seed={self.seed}",
        ]


def guarded(seed: int) -> list[Run]:
    """Runs that collapse, each before the same run with a guard."""
    return [
        *(Run(loss, SCREENED, seed) for loss in GUARDED),
        *(Run(loss, SCREENED, seed, is_long=True) for loss in GUARDED_LONG),
    ]
