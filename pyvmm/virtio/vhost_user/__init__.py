"""A device that another process serves: vhost-user's front end."""
