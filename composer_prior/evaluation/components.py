"""Registers every benchmark by importing the module that holds it."""

from composer_prior.evaluation import scene_foils, scene_questions

__all__ = ["scene_foils", "scene_questions"]
