"""Signing releases and putting them out."""
