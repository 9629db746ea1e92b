"""Webhooks: post what is appended to the rooms to an application.

A webhook is a cursor.  For each room the store keeps the number of the last entry that the application has taken.  A
delivery is "send everything after N" over HTTP.  `delivery` decides what is sent when, and `lease` which node sends.
`batch` encodes, `signature` signs, and `sender` makes the request.  `fanout` follows the log for all webhooks.
"""
