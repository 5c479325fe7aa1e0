"""`python -m r2scp.jobs`: the command line."""

from r2scp.jobs.cli.main import app

if __name__ == "__main__":
    app()
