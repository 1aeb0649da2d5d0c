"""Engines move rows; each fulfils `epcomm.engines.base.Engine`."""
