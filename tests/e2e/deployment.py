"""Deployments that run this folder's app unless told otherwise."""

import re
import signal
from pathlib import Path

import simulations.launch.deployment
from simulations.launch.deployment import ROOT as ROOT
from simulations.launch.deployment import Site as Site
from simulations.launch.deployment import await_that as await_that

APP = Path(__file__).parent / "app"


class Deployment(simulations.launch.deployment.Deployment):
    def run(self, app=APP, **config):
        return super().run(app, **config)

    def give_state_dirs(self):
        """Restart the SuperNodes with a folder for what participants keep."""
        old = [site.process for site in self.sites]
        for site in self.sites:
            site.command[-1] += f' state-dir="{site.home / "state"}"'
            site.kill(signal.SIGTERM)
        await_that(lambda: all(s.process not in old for s in self.sites), 60, "new SuperNodes")
        self.await_nodes(len(self.sites))


def node_of(site):
    """The id of a site's node, which its SuperNode writes to its log."""
    return int(re.findall(r"SuperNode ID: (\d+)", site.log.read_text())[-1])
