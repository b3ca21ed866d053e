"""The paper's Tables 2 to 6 as studies.

Reported accuracies are the paper's; most of its comparators it copied from papers with recipes of
their own. Recipes here are those of LAB (Hou et al., ICLR 2017) and ALQ (Qu et al., CVPR 2020),
whose networks BLAQ's paper borrows; its own learning rates and epochs are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .study import Comparison, Plan, Row, Study

__all__ = ["STUDIES"]

LAB = {"loss": "squared-hinge", "output_norm": True, "init_rule": "lab", "schedule": "step"}


def _blaq(key: str, label: str, *, project: bool = False, like: str = "",
          paper: float | None = None, **settings: object) -> Row:
    return Row(key, label, {"method": "blaq", **settings}, paper, project, like, evaluations=2)


def _pair_claims(gap: float | None, full: float | None = None) -> Sequence[Comparison]:
    """BLAQ against LAQ and full precision."""
    return (Comparison("BLAQ is above LAQ after as many epochs", "blaq", "laq", gap),
            Comparison("BLAQ is above LAQ after as many gradient evaluations", "blaq", "laq-2x"),
            Comparison("BLAQ is above full precision", "blaq", "fp", full))


def _one_bit(fp: float | None, bc: float | None, bwn: float | None, laq: float | None,
             blaq: float | None) -> tuple[Row, ...]:
    """The paper's 1-bit rows, and LAQ with BLAQ's number of gradient evaluations."""
    return (Row("fp", "full precision", {"method": "fp"}, fp),
            Row("bc", "BinaryConnect", {"method": "bc"}, bc),
            Row("bwn", "BWN", {"method": "bwn"}, bwn),
            Row("laq", "LAQ", {"method": "laq"}, laq),
            Row("laq-2x", "LAQ, twice the epochs", {"method": "laq"}, None, like="laq", epochs=2),
            _blaq("blaq", "BLAQ, a = 0.6", paper=blaq))


BACKTRACKS = (_blaq("blaq-a75", "BLAQ, a = 0.75", backtrack=0.75, project=True),
              _blaq("blaq-a875", "BLAQ, a = 0.875", backtrack=0.875, project=True),
              _blaq("blaq-a90", "BLAQ, a = 0.9", backtrack=0.9, project=True))
"""Other values of ``backtrack``, each with a sweep of its own."""
ROW_SCALES = (Row("laq-rows", "LAQ, a scale for each row", {"method": "laq", "group_size": -1},
                  project=True, like="laq"),
              _blaq("blaq-rows", "BLAQ, a scale for each row", project=True, like="blaq",
                    group_size=-1))
TWO_BITS = (Row("laq-2bit", "LAQ, 2 bits", {"method": "laq", "bits": 2}, project=True, like="laq"),
            _blaq("blaq-2bit", "BLAQ, 2 bits", project=True, like="blaq", bits=2),
            _blaq("blaq-2bit-exact", "BLAQ, 2 bits, exact solve", project=True, like="blaq", bits=2,
                  solve="exact"))
ONE_PASS = Row("blaq-one-pass", "BLAQ in one pass", {"method": "blaq-one-pass"}, project=True,
               like="laq")
REPORTED = {"dc": 99.26, "admm-pruning": 99.20, "alq": 99.12}
"""The paper's comparators on LeNet-5, at widths of their own."""
COMPARATORS = tuple(Row(name, f"{name}, {text}", {"method": name}, REPORTED.get(name),
                        evaluations=2 if name == "saq" else 1) for name, text in (
    ("error-compensation", "1 bit"), ("admm", "1 bit"), ("bc-stochastic", "1 bit"),
    ("lat-approximate", "ternary"), ("lat-exact", "ternary"), ("lat2-approximate", "ternary"),
    ("lat2-exact", "ternary"), ("twn", "ternary"), ("twn-exact", "ternary"), ("trq", "ternary"),
    ("lr-net", "ternary"), ("paretoq-ternary", "ternary"), ("lq-net", "2 bits"),
    ("qil", "2 bits"), ("paretoq", "2 bits"), ("laq-linear", "3 bits"), ("laq-log", "3 bits"),
    ("octav", "4 bits"), ("lsq", "4 bits"), ("ewgs", "4 bits"), ("lotion", "4 bits"),
    ("noise-tempering", "4 bits"), ("saq", "4 bits"), ("lsq-dampened", "4 bits"),
    ("lsq-frozen", "4 bits"), ("dsq", "1 bit"), ("dsq-learned", "1 bit"),
    ("alq", "4 bits and less"), ("aq", "mixed"),
    ("dc", "4 bits and pruned"), ("admm-pruning", "pruned")))
"""Every other method, at its own width, each with a sweep of its own: in the full budget, or by
``--rows``."""
QUICK = {"width": 0.05, "batch_size": 20}

MLP = Study(
    "table3", "4-layer MLP on MNIST", "mnist",
    {"model": "mlp4", "batch_size": 100, **LAB},
    (*_one_bit(98.81, 98.72, 98.69, 98.82, 99.11), *BACKTRACKS, *ROW_SCALES, ONE_PASS,
     *(replace(row, paper=None) for row in COMPARATORS)),
    {"quick": Plan(2, 2, (3e-3, 1e-2), 1, 60, ("fp", "bc", "laq", "laq-2x", "blaq"), QUICK, 40,
                   160),
     "brief": Plan(3, 3, (1e-3, 3e-3, 1e-2, 3e-2), 2, 10_000,
                   ("fp", "bc", "bwn", "laq", "laq-2x", "blaq"), {"width": 0.25}),
     "short": Plan(12, 3, (1e-3, 3e-3, 1e-2, 3e-2), 2, 10_000,
                   ("fp", "bc", "bwn", "laq", "blaq"), {"amp": "bf16", "schedule": "cosine"}),
     "full": Plan(50, 5, (1e-3, 3e-3, 1e-2, 3e-2), 5)},
    _pair_claims(0.29, 0.30), (0.3, 0.5))
"""LAB's recipe: squared hinge loss, batch 100, 50 epochs, x 0.1 after 15 and 25. Differs: pixels
are normalised by the training set's mean and deviation, where LAB subtracts each pixel's mean. The
brief budget has a quarter of the hidden width, 512; the short one all of it, with products in
bfloat16 and a cosine schedule: LAB's steps would end the learning after 4 of 12 epochs."""

LENET = Study(
    "table4", "LeNet-5 on MNIST, 1 bit", "mnist",
    {"model": "lenet5", "batch_size": 100, "schedule": "cosine"},
    (*(row for row in _one_bit(99.19, None, None, None, 99.38) if row.key != "bc"),
     Row("laq-same-lr", "LAQ at BLAQ's learning rate", {"method": "laq"}, project=True,
         like="blaq"),
     *BACKTRACKS, *ROW_SCALES, *TWO_BITS, ONE_PASS,
     *(row for row in COMPARATORS if row.key != "bc-stochastic")),
    {"quick": Plan(2, 2, (3e-3, 1e-2), 1, 60, ("fp", "laq", "laq-2x", "blaq"),
                   {**QUICK, "width": 0.2}, 40, 160),
     "brief": Plan(5, 3, (1e-3, 3e-3, 1e-2, 3e-2), 3, 10_000),
     "short": Plan(20, 3, (1e-3, 3e-3, 1e-2, 3e-2), 4, 20_000,
                   ("fp", "bwn", "laq", "laq-2x", "blaq", "laq-same-lr")),
     "full": Plan(100, 5, (1e-3, 3e-3, 1e-2, 3e-2), 10)},
    (*_pair_claims(None, 0.19),
     Comparison("BLAQ is above LAQ at one learning rate, BLAQ's", "blaq", "laq-same-lr"),
     Comparison("a = 0.75 is above a = 0.6", "blaq-a75", "blaq"),
     Comparison("a = 0.9 is above a = 0.6", "blaq-a90", "blaq"),
     Comparison("a scale for each row is above one for a layer, LAQ", "laq-rows", "laq"),
     Comparison("a scale for each row is above one for a layer, BLAQ", "blaq-rows", "blaq")))
"""Cross-entropy, batch 100, cosine schedule. The brief budget runs every method, the short one the
1-bit rows for longer. BinaryConnect is not here: its weights of ±1 without a
scale need batch norm, which LeNet-5 lacks."""

SMALL = Plan(2, 2, (3e-3, 1e-2), 1, 60, ("fp", "laq", "laq-2x", "blaq"), QUICK, 40, 160)
ONE_BIT_CIFAR = (
    *_one_bit(92.8, 90.1, 89.5, 89.5, 91.5), *BACKTRACKS, *ROW_SCALES, *TWO_BITS,
    Row("trq", "TRQ, ternary", {"method": "trq"}, 91.2),
    Row("aq", "AQ, mixed", {"method": "aq"}, 90.9),
    Row("alq", "ALQ, 4 bits and less", {"method": "alq"}, 90.9))

CIFAR = Study(
    "table2", "VGG on CIFAR-10, ALQ's recipe", "cifar10",
    {"model": "vgg-small", "batch_size": 128, "augment": True, "schedule": "step", "gamma": 0.2},
    ONE_BIT_CIFAR,
    {"quick": SMALL,
     "brief": Plan(5, 3, (1e-3, 3e-3, 1e-2), 2, 10_000,
                   ("fp", "bc", "bwn", "laq", "laq-2x", "blaq"), {"width": 0.25}, 5000),
     "short": Plan(30, 3, (1e-3, 3e-3, 1e-2), 3, 0,
                   ("fp", "bc", "bwn", "laq", "laq-2x", "blaq", "blaq-a75", "blaq-a90"), {}, 5000),
     "full": Plan(100, 5, (1e-3, 3e-3, 1e-2), 10, validation=5000)},
    _pair_claims(2.0, -1.3), (0.3, 0.6, 0.9))
"""Cross-entropy, crops and flips, Adam, x 0.2 after each 30 of 100 epochs. For a GPU."""

CIFAR_LAB = Study(
    "table2-lab", "VGG on CIFAR-10, LAB's recipe", "cifar10",
    {"model": "vgg-small", "batch_size": 50, "gamma": 0.5, **LAB}, ONE_BIT_CIFAR,
    {**CIFAR.plans, "full": Plan(200, 5, (3e-3, 1e-2, 3e-2), 10, validation=5000)},
    _pair_claims(2.0, -1.3), tuple(0.075 * i for i in range(1, 14)))
"""Squared hinge, no augmentation, batch 50, x 0.5 after each 15 of 200 epochs. Differs: channels
are normalised, where LAB normalises contrast and whitens (GCN and ZCA)."""

SVHN = Study(
    "table5", "SVHN-Net on SVHN, LAB's recipe", "svhn-extra",
    {"model": "svhn-net", "batch_size": 50, **LAB},
    (*_one_bit(97.73, 97.55, 97.46, 97.64, 98.13), *BACKTRACKS, *ROW_SCALES),
    {"quick": SMALL,
     "brief": Plan(2, 3, (1e-3, 3e-3), 1, 20_000,
                   ("fp", "bc", "bwn", "laq", "laq-2x", "blaq"), {"width": 0.25}, 6000),
     "short": Plan(10, 3, (3e-4, 1e-3, 3e-3), 1, 100_000,
                   ("fp", "bc", "bwn", "laq", "laq-2x", "blaq"), {}, 6000),
     "full": Plan(50, 5, (3e-4, 1e-3, 3e-3), 5, validation=6000)},
    _pair_claims(0.49, 0.40), (0.3, 0.5))
"""Squared hinge, batch 50, x 0.1 after 15 and 25 of 50 epochs. Differs: channels are normalised,
where LAB normalises contrast, globally and locally (GCN and LCN)."""

IMAGENET = Study(
    "table6", "ResNet-18 on ImageNet", "images",
    {"model": "resnet18", "batch_size": 256, "augment": True, "schedule": "cosine", "clip": 0.0,
     "first_bits": "fp", "last_bits": "fp"},
    (Row("fp", "full precision", {"method": "fp"}, 69.8),
     Row("bwn", "BWN, 1 bit", {"method": "bwn"}, 60.8),
     Row("alq", "ALQ, 1 bit (paper: 1.01 bit)", {"method": "alq", "bits": 1}, 65.6),
     Row("laq", "LAQ, 1 bit", {"method": "laq"}),
     Row("laq-2x", "LAQ, 1 bit, twice the epochs", {"method": "laq"}, like="laq", epochs=2),
     _blaq("blaq", "BLAQ, 1 bit, a = 0.9", paper=66.73, backtrack=0.9, max_iter=10),
     Row("lr-net", "LR-net, 1 bit", {"method": "lr-net", "bits": 1}, 59.9),
     Row("dsq", "DSQ, 1 bit", {"method": "dsq", "bits": 1}, 63.7),
     Row("twn", "TWN, ternary", {"method": "twn"}, 61.8),
     Row("lr-net-2bit", "LR-net, ternary", {"method": "lr-net", "bits": 2}, 63.5),
     Row("lq-net", "LQ-Net, 2 bits", {"method": "lq-net"}, 68.0),
     Row("qil", "QIL, 2 bits", {"method": "qil"}, 68.1),
     Row("octav", "OCTAV, 4 bits", {"method": "octav"}, 69.17),
     Row("alq-2bit", "ALQ, 2 bits", {"method": "alq", "bits": 2}, 68.9, like="alq"),
     Row("laq-2bit", "LAQ, 2 bits", {"method": "laq", "bits": 2}, like="laq"),
     _blaq("blaq-2bit", "BLAQ, 2 bits, a = 0.9", paper=69.62, like="blaq", bits=2,
           backtrack=0.9, max_iter=10)),
    {"quick": Plan(1, 2, (1e-3, 3e-3), 1, 0, ("fp", "laq", "laq-2x", "blaq", "blaq-2bit"),
                   {"width": 0.05, "batch_size": 4}, 4, 16),
     "brief": Plan(1, 1, (3e-4,), settings={"width": 0.25}),
     "short": Plan(10, 3, (1e-4, 3e-4, 1e-3), 1, 100_000),
     "full": Plan(60, 3, (1e-4, 3e-4, 1e-3), 2, 200_000)},
    (*_pair_claims(None, -3.07),
     Comparison("2 bits: BLAQ is above LAQ after as many epochs", "blaq-2bit", "laq-2bit")))
"""Fine-tuning of float weights (``--init``), first and last layer in full precision, no bound on
the latent weights. Images are kept in memory: 151 KB each, 193 GB for all of ImageNet."""

STUDIES = {study.name: study for study in (CIFAR, CIFAR_LAB, MLP, LENET, SVHN, IMAGENET)}
