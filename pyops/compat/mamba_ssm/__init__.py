"""mamba_ssm's Mamba-2 functions on terrazzo's ops. Source of the signatures: state-spaces/mamba 2.2.

Only the functions: no model classes, and no Mamba-1 selective scan.
"""
__version__ = "2.2.4"
