"""Run by `make test-install` against a wheel that was built without a compiler: plain Python, no pytest."""
import terrazzo
import torch
from terrazzo import cases, native

assert not native.available, "this wheel must have no extension"
assert "reinstall with a C++ compiler" in native.why_not
for case in cases.CASES:
    cases.run(case, case.make(torch.float32), None, gradients=bool(case.grads))
assert all(set(ran) == {"reference"} for ran in terrazzo.counters().values()), terrazzo.counters()
try:
    cases.run(cases.CASES[0], cases.CASES[0].make(torch.float32), "cpu")
except terrazzo.BackendError as error:
    assert "extension" in str(error)
else:
    raise AssertionError("a forced cpu backend must raise without the extension")
print(f"without the extension: {len(cases.CASES)} cases ran on the reference backend")
