"""From a file of posts to groups of fans and the artists that each may like; nothing leaves the device."""
