"""How commands end: with a sentence and an exit code, whatever happens."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import click

from moegen.errors import MoegenError

TRACEBACK = "MOEGEN_TRACEBACK"


class Commands(click.Group):
    """A group whose commands end with a sentence and an exit code, whatever happens.

    2 for what is wrong with the input, 1 for a fault of moegen, 130 for Ctrl-C.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; errors become messages on stderr."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except MoegenError as error:
            click.echo(str(error), err=True)
            self._trace(ctx)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            sys.stdout = None  # nobody reads it any more
            ctx.exit(141)
        except OSError as error:
            click.echo(f"error: {error.filename or 'output'}: {error.strerror or error}", err=True)
            self._trace(ctx)
            ctx.exit(1)
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            click.echo(f"moegen failed: {type(error).__name__}: {said}", err=True)
            if not self._trace(ctx):
                click.echo("This is a fault of moegen. --traceback shows where it is.", err=True)
            ctx.exit(1)

    def _trace(self, ctx: click.Context) -> bool:
        wanted = bool(ctx.params.get("traceback"))
        if wanted:
            click.echo(traceback.format_exc(), err=True)
        return wanted
