// Asks for names by both of Java's resolvers, the C library's (InetAddress) and its own (JNDI), and prints the addresses; for
// the last name its text, by its own.
import java.net.InetAddress;
import java.util.Arrays;
import java.util.Collections;
import java.util.HashSet;
import java.util.Hashtable;
import java.util.Set;
import javax.naming.Context;
import javax.naming.directory.Attribute;
import javax.naming.directory.Attributes;
import javax.naming.directory.InitialDirContext;

public class Resolve {
    public static void main(String[] names) throws Exception {
        Hashtable<String, String> settings = new Hashtable<>();
        settings.put(Context.INITIAL_CONTEXT_FACTORY, "com.sun.jndi.dns.DnsContextFactory");
        settings.put(Context.PROVIDER_URL, "dns:");
        InitialDirContext own = new InitialDirContext(settings);
        for (int number = 0; number < names.length - 1; number++) {
            Set<InetAddress> found = new HashSet<>(Arrays.asList(InetAddress.getAllByName(names[number])));
            int count = 0;
            Attributes records = own.getAttributes(names[number], new String[] {"A", "AAAA"});
            for (Attribute of : Collections.list(records.getAll())) {
                for (Object address : Collections.list(of.getAll())) {
                    if (!found.contains(InetAddress.getByName((String) address))) {
                        throw new Exception("InetAddress: " + found + ", JNDI: " + address);
                    }
                    count++;
                }
            }
            if (count != found.size()) throw new Exception("InetAddress: " + found + ", JNDI: " + records);
            for (InetAddress address : found) System.out.println(address.getHostAddress());
        }
        int length = 0;
        Attributes texts = own.getAttributes(names[names.length - 1], new String[] {"TXT"});
        for (Object text : Collections.list(texts.get("TXT").getAll())) {
            // Several strings of one record are quoted where they need it, and joined by spaces.
            length += ((String) text).replaceAll("[\" ]", "").length();
        }
        System.out.println("text " + length);
    }
}
