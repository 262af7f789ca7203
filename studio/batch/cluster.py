"""A Ray cluster that strangers do not reach. Whoever reaches the ports of one, and needs no token, runs code on it.

Ray in token mode (`RAY_AUTH_MODE=token`, one `RAY_AUTH_TOKEN` on every node) refuses calls without the token. Before
any data go out, an existing cluster is asked without it, which it must refuse, and all its nodes must have addresses
that the internet does not reach. A cluster that is started here has its own token and stays on the loopback interface.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Any

from graft.studio.errors import InputError

SECONDS = 30.0
"""That a cluster may take to answer."""
REFUSED = ("AuthenticationError", "UNAUTHENTICATED", "Unauthenticated")
"""What a cluster says to those who have no token."""
HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray takes 127.0.0.1 for the address by which others reach the machine, unless it is for this machine alone."""


def settle() -> str:
    """Set the variables that Ray reads when it is imported.

    Returns:
        The address of an existing cluster, `RAY_ADDRESS`, or "" if one is to be started here.

    Raises:
        InputError: the address is none, or one that the internet reaches; token mode is off.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise InputError(f"RAY_AUTH_MODE={mode}", "whoever reaches a port of Ray could run code there", "Unset it")
    if not address:
        os.environ["RAY_AUTH_TOKEN"] = os.urandom(32).hex()
        os.environ.update(HERE)
        return ""
    host, port = _parts(address)
    try:
        found = {str(each[4][0]).partition("%")[0] for each in socket.getaddrinfo(host, port)}
    except OSError as error:
        raise InputError(
            f"RAY_ADDRESS={address}", f"{host} is not known: {error}", "Give the head's address"
        ) from error
    _check_private(f"RAY_ADDRESS={address}", found)
    return address


def connect(library: Any, address: str, carried: Mapping[str, str]) -> None:
    """Connect to a cluster, or start one here if there is no address.

    Args:
        library: Ray.
        address: of `settle`.
        carried: variables for the tasks.

    Raises:
        InputError: the cluster does not answer, or answers to those who have no token; the internet reaches a node.
    """
    common = {"log_to_driver": False, "runtime_env": {"env_vars": dict(carried)}}
    if not address:
        library.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, **common)
        return
    _check_token(address)
    try:
        library.init(address=address, **common)
    except Exception as error:  # Ray has several kinds for it
        said = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "Run this on one of its nodes, with its RAY_AUTH_TOKEN"
        raise InputError(f"RAY_ADDRESS={address}", f"no connection: {said[-1]}", remedy) from error
    try:
        _check_private("Ray's cluster", (node["NodeManagerAddress"] for node in library.nodes() if node["Alive"]))
    except InputError:
        library.shutdown()
        raise


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        remedy = "Give HOST:PORT of its head, such as 10.0.0.5:6379"
        raise InputError(f"RAY_ADDRESS={address}", "that is not the address of a cluster", remedy)
    return host.strip("[]"), int(port)


def _check_private(what: str, addresses: Iterable[str]) -> None:
    for address in addresses:
        if ip_address(address).is_global:
            remedy = "Start its nodes with --node-ip-address of a private interface"
            raise InputError(what, f"{address} is not a private address: the internet may reach its ports", remedy)


def _check_token(address: str) -> None:
    """Knock without a token."""
    what = f"RAY_ADDRESS={address}"
    try:
        socket.create_connection(_parts(address), timeout=SECONDS).close()
    except OSError as error:
        raise InputError(what, f"nothing answers there: {error}", "Start the cluster, or correct it") from error
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": SECONDS, "text": True}
    try:
        done = subprocess.run(command, env={**bare, "RAY_AUTH_MODE": "disabled"}, check=False, **settings)
    except subprocess.TimeoutExpired as error:
        raise InputError(what, f"no answer for {SECONDS:g} s", "Is that the port of a head of Ray?") from error
    remedy = "Start each of its nodes with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN, and set these here too"
    if done.returncode == 0:
        raise InputError(what, "it answers without a token: whoever reaches it could run code there", remedy)
    if not any(word in done.stderr + done.stdout for word in REFUSED):
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise InputError(what, f"it does not ask for a token, but says: {said[-1]}", remedy)
