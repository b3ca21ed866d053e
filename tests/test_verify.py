import pytest
import torch

from blaq.train import verify


def test_check_logits_by_hand():
    exact = torch.tensor([[1.0, 2.0], [4.0, 3.0]], dtype=torch.float64)
    trained = (exact + 1e-4).float()
    within, beyond = (exact + 1.9e-4).float(), (exact + 2.1e-4).float()
    for reference, fast, outcome in (
            (trained, trained, [True, True]), (trained, within, [True, True]),
            (trained, beyond, [True, False]), (trained.nextafter(torch.tensor(9.0)), within,
                                               [False, True]),
            (trained * torch.nan, trained * torch.nan, [False, False])):
        checks = verify.check_logits(trained, exact, reference, fast)
        assert [check.passed for check in checks] == outcome
    assert checks[0].measured.startswith("4 of 4 differ")


def test_a_process_that_cannot_load_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"must load .*packed.safetensors, got: (.|\n)*config"):
        verify.fresh_logits(tmp_path, "auto")
