"""One replica over several processes: number 0 leads, the others do what it says.

The way of a step: `jslora.runner` asks `group` as it would ask one device; `group` turns the call
into a message (`messages`, with arrays as what changed of them, `deltas`) for every follower, over
`links` and a numbered and hashed `channel`. A follower hears it on its `uplink`, and `obedience`
carries it out on its own device, as the leader does on its own.

The way of an adapter: `hosts` asks all processes what lies in its folder, and followers read it
from their `shelf`; where all have the same, the leader's `transfers` and the followers'
`deliveries` bring each process's part to the same pages of its devices.

Who is in: the configuration says it (`section`), or a launcher does (`environment`, `detect`). The
leader listens on its `interface` and admits who knows the token and was started alike
(`agreement`, `links`); then all join JAX's own group (`launch`). `leader` and `follower` are the
two ends of this.

What ends a group: a connection that is lost or silent, or a message that was changed (`links` and
`uplink`, over `channel`), tokens that differ (`digests`), a step that takes too long
(`group.StepWatch`), and whatever a device raises. It ends as a whole and nothing goes on in it:
its processes exit, and `serve.py` on each host starts the next.
"""
