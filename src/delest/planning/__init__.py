"""Choosing methods so that training fits a budget and is as fast as it can be; pure Python over measured figures."""
