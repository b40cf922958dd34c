"""A guest that prints without end through its serial port keeps all its processors."""

from __future__ import annotations

import pytest
from vms import debian, script

pytestmark = pytest.mark.usefixtures("linux_guests")

ROUNDS = 3
# Linux moves the port's interrupt to the second processor when the next one comes, which is while
# the first one handles that. In the meantime the second one prints.
PRINT = """\
irq=$(sed -n 's/^ *\\([0-9]*\\):.*ttyS0.*/\\1/p' /proc/interrupts)
echo 1 > /proc/irq/$irq/smp_affinity
for n in 1 2 3; do echo a few words > /dev/ttyS0; sleep 0.1; done
echo 2 > /proc/irq/$irq/smp_affinity
taskset 2 sh -c 'while :; do :; done' > /dev/null 2>&1 < /dev/null &
echo $! > /run/spins
taskset 2 yes 'what a guest has to say' > /dev/ttyS0 2> /dev/null < /dev/null &
echo $! > /run/prints
"""
WORK = """\
taskset 1 dd if=/dev/vda of=/dev/null bs=4k count=50 iflag=direct status=none
echo "read=$?"
kill -9 $(cat /run/spins /run/prints)
"""


def test_a_processor_beside_one_that_prints_gets_its_work_done(microvm_factory):
    vm = microvm_factory(**debian(variant="test"), cpus=2)
    for _ in range(ROUNDS):
        script(vm, PRINT)
        assert script(vm, WORK)["read"] == "0"
    assert "what a guest has to say" in vm.console.text
