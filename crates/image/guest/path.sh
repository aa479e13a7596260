# Debian's /etc/profile leaves the directories of system programs (sysctl, service, modprobe) to root.
case ":$PATH:" in
  *:/usr/sbin:*) ;;
  *) PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" ;;
esac
