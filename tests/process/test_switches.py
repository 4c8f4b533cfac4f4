"""Settings of the process are switched once for all calls at a time, and are put back after the last."""

import threading
import warnings
from contextlib import contextmanager, suppress

import pytest
import torch

from ggn_ntk.process.switches import Switch, full_precision, process_switches


@pytest.mark.parametrize("fails", ["", "in", "out"])
def test_a_switch_is_entered_once(fails):
    log, inside, leave = [], threading.Barrier(4), threading.Event()

    @contextmanager
    def context():
        log.append("in")
        if fails == "in" and len(log) == 1:
            raise OSError(fails)
        yield
        log.append("out")
        if fails == "out" and len(log) == 2:
            raise OSError(fails)

    def run():
        with switch, switch:
            inside.wait()
            leave.wait()

    switch = Switch(context)
    with suppress(OSError), switch:
        pass
    log.clear()
    log.append("first")
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    inside.wait()
    with suppress(KeyError), switch:
        leave.set()
        for thread in threads:
            thread.join()
        assert log == ["first", "in"]
        raise KeyError
    assert log == ["first", "in", "out"]


def test_what_is_switched():
    b = torch.backends

    def settings():
        fast = b.mha.get_fastpath_enabled(), b.cuda.flash_sdp_enabled(), b.cudnn.enabled, b.mkldnn.enabled
        return *fast, len(warnings.filters)

    before = settings()
    with process_switches(recurrent=True):
        assert settings()[:4] == (False,) * 4
        with process_switches(recurrent=False):
            pass
        assert settings()[:4] == (False,) * 4
        warnings.simplefilter("ignore", BytesWarning)
    assert settings() == (*before[:4], before[4] + 1)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has the legacy flags only")
def test_fp32_precision_is_restored_with_its_inheritance():
    backends = torch.backends
    with full_precision():
        assert backends.cudnn.conv.fp32_precision == "ieee"
        assert backends.mkldnn.conv.fp32_precision == "ieee"
    before = backends.fp32_precision
    try:
        backends.fp32_precision = "tf32"
        with full_precision():
            assert backends.mkldnn.conv.fp32_precision == "ieee"
        assert backends.mkldnn.conv.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert backends.mkldnn.conv.fp32_precision == "ieee"
    finally:
        backends.fp32_precision = before


@pytest.mark.skipif(hasattr(torch.backends, "fp32_precision"), reason="this torch has other flags")
def test_legacy_precision_flags():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.allow_tf32 == before[1]
    torch.set_float32_matmul_precision(before[0])
