"""What trains on a device: the same tests on an accelerator (``make gpu``) and, where they make sense, on the CPU."""

from tests.gpu.packages import make_importable

make_importable()
