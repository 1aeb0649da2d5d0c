"""Between nodes that have a network stack each: two network namespaces, a veth pair, and TCP."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launch import Result, find_mpiexec, run_ranks
from processes import wait_for

Mpiexec = Callable[..., Result]

ADDRESSES = ("10.213.77.1", "10.213.77.2")
#: Enters the namespace of an address: mpiexec starts what runs on a "host" with it.
LAUNCHER = """#!/bin/sh
while [ "${1#10.213.77.}" = "$1" ]; do shift; done
name=PREFIX${1##*.}; shift
exec ip netns exec "$name" sh -c "$*"
"""


@dataclass(frozen=True)
class Network:
    """Two namespaces: their names, and the launcher that enters them."""

    names: tuple[str, str]
    launcher: Path

    def run(self, mpiexec: Mpiexec, program: str, *args: Any, **options: Any) -> Result:
        """Run a program on 4 ranks, two in each namespace."""
        hosts = ",".join(f"{address}:2" for address in ADDRESSES)
        return mpiexec(
            *(program, 4, *args),
            # TCP alone: the namespaces are of one host, and MPI would find shared memory.
            env={
                "EPCOMM_RANKS_PER_NODE": "2",
                "UCX_TLS": "tcp,self",
                "UCX_NET_DEVICES": "rail0",
                "FI_PROVIDER": "tcp",
            },
            prefix=["ip", "netns", "exec", self.names[0]],
            mpiexec_options=[
                *("-launcher", "ssh", "-launcher-exec", str(self.launcher), "-hosts", hosts)
            ],
            **options,
        )


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=30)


def why_not() -> str:
    """Return why this machine cannot have such a network, or an empty string."""
    if shutil.which("ip") is None:
        return "no ip command (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    found = find_mpiexec()
    if found is None:
        return "no mpiexec beside this Python or on PATH: pip install mpich"
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60)
    return "" if "HYDRA" in version.stdout else "mpiexec is not Hydra (MPICH), whose launcher it is"


def read(name: str, what: str) -> str:
    """Read what the kernel tells of a namespace's end of the wire."""
    command = ["ip", "netns", "exec", name, "cat", f"/sys/class/net/rail0/{what}"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    return run.stdout.strip()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    prefix = f"epcomm{os.getpid()}-"
    names = (f"{prefix}1", f"{prefix}2")
    launcher = tmp_path_factory.mktemp("network") / "launcher"
    launcher.write_text(LAUNCHER.replace("PREFIX", prefix))
    launcher.chmod(0o755)
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ends = [["rail0", "netns", name] for name in names]
            ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "rail0")
                for device in ("lo", "rail0"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        made = Network(names, launcher)
        try:
            for name in names:
                wait_for(lambda name=name: read(name, "operstate") == "up", f"rail0 of {name}")
            made.run(run_ranks, "launch_probe", "shows", timeout_s=60)
        except AssertionError as error:
            pytest.skip(f"MPI alone does not connect over this network: {str(error)[-200:]}")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)


def sent_bytes(network: Network) -> int:
    return int(read(network.names[0], "statistics/tx_bytes"))


@pytest.mark.parametrize("program", ["contract_dispatch", "contract_rails"])
def test_contract_over_tcp(network: Network, mpiexec: Mpiexec, program: str) -> None:
    before = sent_bytes(network)
    network.run(mpiexec, program)
    # Rows of both went over the wire, not around it.
    assert sent_bytes(network) - before > 1 << 20


def test_cut_network_ends_all_ranks(network: Network, mpiexec: Mpiexec) -> None:
    network.run(mpiexec, "rails_fail", "cut", "rail0", timeout_s=60, check=True)
