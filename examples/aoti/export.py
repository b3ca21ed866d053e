"""Compile a packed MLP to model.pt2, and keep an input with the output that it must give.

  python examples/aoti/export.py build/aoti
"""

import sys
from pathlib import Path

import torch

import blaq
from blaq.train.models import build


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build("mlp4", 10, (1, 28, 28), width=0.25).eval()
    blaq.BLAQ(blaq.param_groups(model, bits=1))  # quantizes; a real model comes from training
    blaq.pack(model)
    x = torch.randn(5, 1, 28, 28)
    batch = {0: torch.export.Dim("batch", max=4096)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 1, 28, 28),), dynamic_shapes=(batch,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        expected = model(x)
    x.numpy().tofile(folder / "input")
    expected.numpy().tofile(folder / "expected")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
