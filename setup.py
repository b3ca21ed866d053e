from setuptools import setup

setup(packages=["blaq_kernels"])
