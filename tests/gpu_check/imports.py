"""What every check needs, imported once: each check runs in a fork of the process that has done so.

Importing opens no CUDA context, which would not outlast a fork.
"""

from tests.gpu_check import stand_in

stand_in.install_if_needed()

from cvae.training import train  # noqa: E402, F401
