"""Deployments that run this folder's app unless told otherwise."""

from pathlib import Path

import simulations.deployment
from simulations.deployment import ROOT as ROOT
from simulations.deployment import Site as Site
from simulations.deployment import await_that as await_that

APP = Path(__file__).parent / "app"


class Deployment(simulations.deployment.Deployment):
    def run(self, app=APP, **config):
        return super().run(app, **config)
