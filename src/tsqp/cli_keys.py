"""``tsqp keygen``: key pairs for encrypted, mutually authenticated connections."""

from __future__ import annotations

from typing import Annotated

import typer

Directory = Annotated[
    str, typer.Argument(metavar="DIR", show_default=False, help="Where the two files go; made with mode 0700.")
]
Name = Annotated[str, typer.Option(metavar="NAME", help="What the files are called: NAME.key and NAME.key_secret.")]

EPILOG = "Example: [bold]tsqp keygen ~/.tsqp/keys --name server[/]"


def keygen(*, directory: Directory, name: Name = "tsqp") -> None:
    """Makes a CURVE key pair for one end of a connection: NAME.key is public, NAME.key_secret stays on this machine.

    Nothing is overwritten. Each end has a pair of its own, a server and each of its clients.
    """
    from .curve import make_keys

    public, secret = make_keys(directory, name)
    print(f"secret key  {secret}  (mode 0600; stays on this machine)")
    print(f"public key  {public}")
    print("For a server: copy the public key to each client.")
    print(f"  server:  tsqp serve --curve-key {secret} --curve-clients DIRECTORY_OF_CLIENTS_PUBLIC_KEYS")
    print(f"  client:  tsqp generate --curve-key ITS_OWN.key_secret --curve-server {public.name}")
    print("For a client: copy the public key into the directory that the server has as --curve-clients.")
    print(f"  client:  tsqp generate --curve-key {secret} --curve-server SERVER.key")
